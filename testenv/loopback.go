package testenv

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"net"

	"golang.org/x/sys/unix"
)

// Loopback draws a network of 127/8, which is loopback as a whole, such as "127.1.2".
// Nobody else draws the same, in this process or another, before free is called.
func Loopback() (network string, free func() error, err error) {
	for {
		network = fmt.Sprintf("127.%d.%d", 1+rand.IntN(254), rand.IntN(256))
		l, err := net.Listen("tcp", network+".0:7443") // no host's; it shows that the network is taken
		if err == nil {
			return network, l.Close, nil
		}
		if !errors.Is(err, unix.EADDRINUSE) {
			return "", nil, err
		}
	}
}
