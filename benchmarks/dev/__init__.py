"""What only a checkout needs: gating, recording, comparing, and the pages made from results. Not installed."""
