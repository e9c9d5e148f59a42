"""`python -m ulysses_infer.cli` is `ulysses-infer`."""

from ulysses_infer.cli.main import main

if __name__ == "__main__":
    main()
