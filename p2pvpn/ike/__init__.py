"""IKEv2 (RFC 7296) as initiator and responder: payloads, message rules, states, tasks, one SA, all SAs."""
