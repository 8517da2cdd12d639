package disk

var TrustedOwner = trustedOwner
