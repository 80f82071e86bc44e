"""What people see: bars and lines while something runs, and pages in a notebook."""
