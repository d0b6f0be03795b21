"""What a run tells about itself: throughput and MFU, the files it writes, the console line, and the report."""
