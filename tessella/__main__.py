"""`python -m tessella` is `tessella`."""

from tessella.cli import program

if __name__ == "__main__":
    program()
