"""Objects as plain data: what is kept of anything that a run can reach, and how it is put back."""
