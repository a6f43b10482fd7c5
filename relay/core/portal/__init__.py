"""The relay's side of the portal's channel, without IO: text frames, connection events and a time in, commands out.

`channel` has the states; `frames` what is said; `endpoint` where to, and who we are; `refusal` and `retry` what follows when
that fails; `limits` all numbers.
"""
