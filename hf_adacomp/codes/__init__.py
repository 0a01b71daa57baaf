"""What a code is, how its bits are decided, and how it is stored.

A code of L bits chooses among the L code vectors of a code-book; the vector it stands for is the sum of those it
chooses, plus a bias. Read `codebook` first, `bits` for the file's format.
"""
