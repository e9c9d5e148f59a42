"""Step times: predicted from measurements, or estimated before any. Without torch and ranks."""
