package config_test

import (
	"errors"
	"fmt"

	"conseal/config"
)

func ExampleParseRoster() {
	_, err := config.ParseRoster([]byte(`
fleet = "demo"
version = 0
[[host]]
name = "alpha"
adress = "127.0.0.1:7001"
`))
	var problems config.Problems
	if errors.As(err, &problems) {
		fmt.Println(problems[1])
		fmt.Println(problems[len(problems)-1])
	}
	// Output:
	// roster:3: version: 0: wants 1 or more, one more than the last
	// roster:6: host.adress: unknown key: did you mean "address"?
}
