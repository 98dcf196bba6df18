"""optimum-quanto for qplug: 8-bit weights by row, 4- and 2-bit weights by group with a shift."""
