"""What pages are built of: each draws what it is given and decides nothing."""
