"""What users give or write is looked at before anything is changed: arguments, and names of attributes."""
