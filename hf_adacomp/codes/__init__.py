"""What a code is, how its bits are decided, and how it is stored.

A code of L bits says of each of the first L code vectors of the code-book whether half of it is added or taken away;
the vector that the code stands for is that sum, plus a bias. Read `codebook` first, `bits` for the file's format.
"""
