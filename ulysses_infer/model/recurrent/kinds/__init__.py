"""Rules of recurrent layers that no other kind shares code with."""
