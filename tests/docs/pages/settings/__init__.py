"""What blocks need that their readers have: a file for each page, a function for each name in a mark.

Each is a generator that yields names; after the blocks it is sent what each printed, and may check them.
`torch` and `seqpar` are there anyway. Whatever else is imported, the page imports.
"""
