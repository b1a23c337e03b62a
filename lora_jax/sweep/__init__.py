"""Sweeps: many adapters over one frozen base, trained as one compiled program.

space      the file of `--space`, and its trials
prepare    sessions and data of the trials
groups     trials that share a program, and its members as arrays
program    the compiled step of K members
places     state of the K members while they train
schedule   samplers: which trial comes next, and which stop early
run        the sweep from top to bottom
results    sweep.json, the table, best.yaml and the exported adapters
"""
