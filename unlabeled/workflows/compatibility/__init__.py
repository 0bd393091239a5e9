"""What runs on what: every task tried on every architecture of timm, and the page that says so."""
