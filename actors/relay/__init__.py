"""Between nodes each token crosses once: the relay of a node takes what several expert actors there need, hands it out
inside the node, and answers with one sum a token."""
