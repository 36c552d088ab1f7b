"""What a newcomer installs, on this computer and on others."""
