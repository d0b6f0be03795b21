"""`octant data clean`: rules, masking, decontamination and duplicate removal over a stream of documents."""
