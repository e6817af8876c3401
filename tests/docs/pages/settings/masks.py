"""What is asked of the blocks of docs/masks.md: that they print what is shown."""


def page():
    yield {}
