"""Which token gets how many bits, and when: the size to be met, the selection that learns, the schedule."""
