"""What a step costs: step times learned from measurements, and what is known before any. No torch, no ranks."""
