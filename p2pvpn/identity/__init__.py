"""Keys, certificates, the network document, invitations and enrolment: who may do what."""
