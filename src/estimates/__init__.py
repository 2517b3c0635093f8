"""What a plan will cost and whether it fits, before anything of it runs: for `dry_run=true` and refusals. No torch."""
