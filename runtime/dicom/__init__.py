"""DICOM in: the file bounded and parsed, one frame decoded, and its values turned into what a viewer would show."""
