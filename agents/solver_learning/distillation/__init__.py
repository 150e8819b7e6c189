"""Distilling a solver: what a step may mix in (forms), from whom (teacher), and how (fit, refine).

`fewstep.agents.DODE` puts the parts together.
"""
