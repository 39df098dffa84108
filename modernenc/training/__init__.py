"""Training: start, resume, the Lightning module that obeys the curriculum, and the callbacks around its steps."""
