"""What the `seqpar` command does besides `doctor`: `check` and `bench`, in plain text."""
