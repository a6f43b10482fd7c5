"""What can be measured of a running relay: one table of definitions, read when someone looks, written out in two ways."""
