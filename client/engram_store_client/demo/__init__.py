"""`engram-store demo`: an Engram memory trained on disk, on text that every machine has.

Read `run` first: it is the whole story, phase by phase.
"""
