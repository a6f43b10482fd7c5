"""The relay's side of the portal's channel, without IO: text frames, connection events and a time in, commands out.

`channel` has the states; `conversation` what goes with one connection; `frames` what is said; `endpoint` where to, and who
we are; `refusal`, `retry` and `reasons` what follows when that fails; `quoting` what of it may be shown; `limits` all
numbers.
"""
