"""The script that `deepspeed --num_gpus N ulysses_infer/launch.py ...` (or torchrun) runs on every rank."""

import os
import sys


def import_from_checkout() -> None:
    """Make `import ulysses_infer` mean the package this file is in, whether that is installed or not.

    Python puts a script's own folder first on the path. Here that is the package itself, whose modules (`config`,
    `model`, `cache`, ...) would then shadow top-level packages of the same name, so it gives way to the one above.
    """
    package = os.path.dirname(os.path.abspath(__file__))
    others = [entry for entry in sys.path if os.path.abspath(entry) != package]
    sys.path[:] = [os.path.dirname(package), *others]


if __name__ == "__main__":
    import_from_checkout()
    from ulysses_infer.cli.rank import main

    main(sys.argv[1:])
