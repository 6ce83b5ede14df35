"""Entering a running, unmodified Python process: standard library only, nothing of ours but the errors.

``send.choose_route`` finds the way in, ``send.send`` sends a request; ``protocol`` is what both sides know. Nothing is
imported here: the process that holds a target still starts in a hurry.
"""
