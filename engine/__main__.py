"""`python -m engine …` is `octant …`."""

from engine.cli import main

if __name__ == "__main__":
    main()
