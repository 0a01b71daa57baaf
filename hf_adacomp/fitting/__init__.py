"""What follows from a table, its token counts and a size in closed form, before anything is trained.

`ladder` chooses which code lengths are on offer, `warm_start` fits the code-book that serves them all.
"""
