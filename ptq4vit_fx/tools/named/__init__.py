"""Float models by what users call them: timm, Hugging Face, torchvision, or their own Python; a loader for each."""
