"""`python -m ptq4vit_fx` is `ptq4vit`."""

from ptq4vit_fx.tools.cli import app

if __name__ == "__main__":
    app(prog_name="ptq4vit")
