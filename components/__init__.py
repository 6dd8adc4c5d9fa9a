"""One KFP step each: read artifacts, call one room below, write artifacts."""
