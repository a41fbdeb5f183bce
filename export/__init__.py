"""From the converted graph to ONNX, and the proof that it runs as meant. Import as `ptq4vit_fx.export`."""

if __name__ != "ptq4vit_fx.export":
    raise ImportError(f"import this package as ptq4vit_fx.export, not as {__name__!r}")
