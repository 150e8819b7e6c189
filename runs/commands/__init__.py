"""The subcommands of `fewstep`, one file each."""
