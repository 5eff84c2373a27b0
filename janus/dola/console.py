"""The commands of an installed package: each runs the script that does the same in a checkout."""

import runpy
import sys
from pathlib import Path

PACKAGE = Path(__file__).parents[1]
ROOT_SCRIPTS = PACKAGE / "commands" if (PACKAGE / "commands").is_dir() else PACKAGE.parent
"""Where the root scripts are: a wheel has them inside the package, an editable installation at the checkout's root."""
SCRIPTS = {
    "janus-paint": ROOT_SCRIPTS / "run_batch_prompts.py",
    "janus-ask": ROOT_SCRIPTS / "inference.py",
    "janus-rerank": PACKAGE / "dola" / "rerank.py",
    "janus-compare": PACKAGE / "dola" / "compare" / "__main__.py",
    "janus-layout": PACKAGE / "dola" / "layouts.py",
    "janus-layer-search": PACKAGE / "dola" / "layer_search" / "__main__.py",
    "janus-page": ROOT_SCRIPTS / "demo" / "app.py",
}


def main() -> None:
    """Run the script that goes by the name this process was started under."""
    runpy.run_path(str(SCRIPTS[Path(sys.argv[0]).stem]), run_name="__main__")
