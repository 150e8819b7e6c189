"""The commands of `fewstep`, one file each, imported when it is asked for."""
