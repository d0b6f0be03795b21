"""What keeps a run going: a watchdog, the policy for anomalies, faults to rehearse them with, and where time went."""
