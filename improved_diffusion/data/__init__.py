"""What is on disk and how it is read: file names, videos, data sets, and the frames that the network is given."""
