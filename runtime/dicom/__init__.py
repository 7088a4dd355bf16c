"""DICOM in: a file parsed within limits, one frame decoded, its values turned into what a viewer would show.

DICOM out: pictures and reports in the study of their source.
"""
