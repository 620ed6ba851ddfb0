"""`python -m moestro.cli` is the same as `moestro`."""

from moestro.cli import main

if __name__ == "__main__":
    main()
