"""Programs to use before, beside and after a run; docs/tools.md lists them."""
