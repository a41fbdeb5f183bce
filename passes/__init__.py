"""One file, one pass, one function over a GraphModule. Import as `ptq4vit_fx.passes`."""

if __name__ != "ptq4vit_fx.passes":
    raise ImportError(f"import this package as ptq4vit_fx.passes, not as {__name__!r}")
