"""Calibration: images in, a Calibration out. What is captured, how much at once, and by which loss it is weighed."""
