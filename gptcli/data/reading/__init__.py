"""One file of any kind as its rows, streamed: `gptcli.data.readers` is the way in."""
